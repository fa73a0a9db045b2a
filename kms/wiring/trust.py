"""The trust material of `kms serve`: read at the start, followed by a job and by every handshake."""

from kms.config import ServerConfig
from kms.jobs.job import Job
from kms.pki.client_identity import host_clock
from kms.pki.trust import Trust, TrustFiles
from kms.rpc.server import TlsMaterial

_INTERVAL_SECONDS = 1.0


def open_trust(config: ServerConfig) -> Trust:
    """Return the trust material of *config*. Raises OSError, and MALFORMED for files that cannot be used."""
    files = TrustFiles(config.tls_cert_file, config.tls_key_file, config.client_ca_file, config.client_crl_file)
    return Trust(files, clock=host_clock)


def tls_material(trust: Trust) -> TlsMaterial:
    """Return what a handshake takes of the trust material, as the files are now."""
    trust.follow()
    return TlsMaterial(trust.pair.certificate, trust.pair.key, trust.authorities.pem)


def trust_job(trust: Trust) -> Job:
    """Return the job of each worker that reads changed files, though nobody calls, and logs what ends soon."""

    async def follow() -> None:
        trust.follow()
        trust.log_ends()

    return Job("trust", _INTERVAL_SECONDS, follow)
