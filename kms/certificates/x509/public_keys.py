"""Public keys of others: their types, and which of them are too weak to be certified."""

from math import gcd, isqrt, prod
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from kms.certificates.names import certificate_invalid
from kms.certificates.x509.signing import PublicKey

RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 4096

_EXPONENT_MIN: Final = 65_537
_EXPONENT_BITS_MAX: Final = 256
_FERMAT_ROUNDS: Final = 100


def _primes(below: int) -> list[int]:
    return [number for number in range(2, below) if all(number % divisor for divisor in range(2, isqrt(number) + 1))]


_SMALL_PRIMES: Final = prod(_primes(752))  # NIST SP 800-56B section 6.4.2.3: a modulus has no factor below 752
_ROCA_GENERATOR: Final = 65_537
_ROCA_PRIMES: Final = [prime for prime in _primes(168) if prime > 2]
_ROCA_RESIDUES: Final = {prime: frozenset(pow(_ROCA_GENERATOR, each, prime) for each in range(prime)) for prime in _ROCA_PRIMES}
# Points whose order divides 8: anybody can sign for some messages with them (RFC 8032 section 5.1, without the sign bit).
_SMALL_ORDER: Final = frozenset(
    bytes.fromhex(point)
    for point in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def check_strong(key: PublicKey) -> None:
    """Raise CERTIFICATE_INVALID for a key that is known to be weak. A curve's points are checked when they are read."""
    match key:
        case rsa.RSAPublicKey():
            numbers = key.public_numbers()
            check_strong_rsa(numbers.n, numbers.e)
        case ed25519.Ed25519PublicKey():
            point = key.public_bytes_raw()
            if point[:-1] + bytes((point[-1] & 0x7F,)) in _SMALL_ORDER:
                raise certificate_invalid("key", "expected an Ed25519 key of full order")


def check_strong_rsa(modulus: int, exponent: int) -> None:
    """Raise CERTIFICATE_INVALID unless the key is of a good size, exponent and modulus (NIST SP 800-56B section 6.4.2)."""
    if not RSA_BITS_MIN <= modulus.bit_length() <= RSA_BITS_MAX or modulus.bit_length() % 8:
        raise certificate_invalid("key", f"expected RSA of {RSA_BITS_MIN} to {RSA_BITS_MAX} bits, in whole bytes")
    if exponent < _EXPONENT_MIN or exponent % 2 == 0 or exponent.bit_length() > _EXPONENT_BITS_MAX:
        raise certificate_invalid("key", "expected an odd public exponent of RSA from 65537 to 2^256")
    if gcd(modulus, _SMALL_PRIMES) != 1:
        raise certificate_invalid("key", "expected an RSA modulus without small factors")
    if is_roca(modulus):
        raise certificate_invalid("key", "expected an RSA key that is not weak by CVE-2017-15361 (ROCA)")
    if _has_close_primes(modulus):
        raise certificate_invalid("key", "expected an RSA modulus whose primes are not close to each other")


def is_roca(modulus: int) -> bool:
    """Whether *modulus* is of the kind that Infineon's chips made: a power of 65537 modulo each small prime.

    Another modulus is taken for one with a chance of about 1 in 2^27 (Nemec et al., "The Return of Coppersmith's Attack").
    """
    return all(modulus % prime in residues for prime, residues in _ROCA_RESIDUES.items())


def _has_close_primes(modulus: int) -> bool:
    """Whether Fermat's method finds the primes within a hundred rounds."""
    middle = isqrt(modulus)
    for candidate in range(middle + 1, middle + 1 + _FERMAT_ROUNDS):
        rest = candidate * candidate - modulus
        if isqrt(rest) ** 2 == rest:
            return True
    return False
