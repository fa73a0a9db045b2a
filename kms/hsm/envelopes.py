"""Keys into envelopes and out of them, within one session. The format is that of `kms.domain.envelope`.

WRAPPED: the private key wrapped by the KEK with AES-KWP (RFC 5649), then sealed. SEALED: the raw private key, sealed; only
here does a private key pass through this process. RESIDENT: the CKA_ID of a token object, sealed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import pkcs11
from pkcs11 import Attribute, ObjectClass

from kms.domain.algorithms import EC_TYPES, KeySpec, KeyType
from kms.domain.envelope import Envelope, associated_data, parse_envelope
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial
from kms.hsm import mechanisms, templates
from kms.hsm.errors import ALTERED_INPUT, MisfitError, unsupported
from kms.hsm.public_keys import check_fits, check_value, read_public_key
from kms.hsm.residents import find_resident, resident_label
from kms.hsm.session import TokenSession
from kms.hsm.templates import Template

_NO_KEK: Final = UUID(int=0)
_SCALAR_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Handle:
    """A key ready for use in one session. That of a RESIDENT key is the token's own object."""

    key: Any
    is_resident: bool

    def drop(self) -> None:
        """Give the handle up: a session object is destroyed, a resident one stays in the token."""
        if not self.is_resident:
            self.key.destroy()


def make_key(session: TokenSession, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
    """Make a key and return its envelope. Nothing but a RESIDENT object stays in the token, and that only on success."""
    public, private = _generate(session.raw, identity, custody)
    try:
        public_key = check_value(private) if public is None else read_public_key(identity.spec, public)
        inner, kek_id = _inner(session, identity, custody, private)
        aad = associated_data(
            identity, custody=custody, public_key=public_key, sealing_key_id=session.sealing_key_id, kek_id=kek_id
        )
        nonce, sealed = session.seal(inner, aad)
    except BaseException:
        private.destroy()
        raise
    finally:
        if public is not None:
            public.destroy()
    if custody is not Custody.RESIDENT:
        private.destroy()
    envelope = Envelope(custody, kek_id, session.sealing_key_id, nonce, sealed).encode()
    return KeyMaterial(custody, public_key, envelope, inner.hex() if custody is Custody.RESIDENT else None)


def open_key(session: TokenSession, held: HeldKey) -> Handle:
    """Return a handle to the key, proven to fit its record.

    Raises HSM_KEK_MISSING, ENVELOPE_INVALID for what is no envelope, `MisfitError` for one that does not open or does not
    fit, and the binding's errors for everything else.
    """
    try:
        envelope, inner = unsealed(session, held)
        handle = _load(session, held.identity, envelope, inner)
    except ALTERED_INPUT:
        raise MisfitError from None
    return _proven(handle, session, held)


def unsealed(session: TokenSession, held: HeldKey) -> tuple[Envelope, bytes]:
    """Return the envelope of the key and its inner layer, which the seal proves to be of this record.

    Raises HSM_KEK_MISSING, ENVELOPE_INVALID, `MisfitError`, and the binding's errors: `ALTERED_INPUT` for a wrong tag.
    """
    envelope = parse_envelope(held.material.envelope)
    if envelope.custody is not held.material.custody:
        raise MisfitError
    aad = _data_of(held, envelope.kek_id, envelope.sealing_key_id)
    return envelope, session.unseal(envelope.sealing_key_id, envelope.nonce, envelope.sealed, aad)


def rewrap(session: TokenSession, held: HeldKey) -> str:
    """Return an envelope of the key under the generation that makes new ones, bound to the same record.

    A WRAPPED key goes from one KEK to the other inside the token. Raises as `open_key` does.
    """
    try:
        envelope, inner = unsealed(session, held)
        if envelope.custody is Custody.WRAPPED:
            inner = _under_new_kek(session, held.identity.spec, envelope.kek_id, inner)
    except ALTERED_INPUT:
        raise MisfitError from None
    kek_id = session.kek_id if envelope.custody is Custody.WRAPPED else _NO_KEK
    nonce, sealed = session.seal(inner, _data_of(held, kek_id, session.sealing_key_id))
    return Envelope(envelope.custody, kek_id, session.sealing_key_id, nonce, sealed).encode()


def _under_new_kek(session: TokenSession, spec: KeySpec, kek_id: UUID, wrapped: bytes) -> bytes:
    key = session.kek(kek_id).unwrap_key(
        ObjectClass.SECRET_KEY if spec.is_symmetric else ObjectClass.PRIVATE_KEY,
        mechanisms.P11_TYPE[spec.key_type],
        wrapped,
        mechanism=mechanisms.WRAP,
        capabilities=templates.REWRAP_CAPABILITIES,
        template=dict(templates.REWRAP if spec.is_symmetric else templates.REWRAP_PRIVATE),
    )
    try:
        return bytes(session.kek(session.kek_id).wrap_key(key, mechanism=mechanisms.WRAP))
    finally:
        key.destroy()


def _data_of(held: HeldKey, kek_id: UUID, sealing_key_id: UUID) -> bytes:
    material = held.material
    return associated_data(
        held.identity,
        custody=material.custody,
        public_key=material.public_key,
        sealing_key_id=sealing_key_id,
        kek_id=kek_id,
    )


def _proven(handle: Handle, session: TokenSession, held: HeldKey) -> Handle:
    try:
        check_fits(handle.key, held.identity.spec, held.material.public_key, session.oaep_hashes)
    except BaseException:
        handle.drop()
        raise
    return handle


def _generate(session: pkcs11.Session, identity: KeyIdentity, custody: Custody) -> tuple[Any | None, Any]:
    spec = identity.spec
    template: Template = templates.CREATION_SEALED if custody is Custody.SEALED else templates.CREATION
    names: dict[str, Any] = {}
    if custody is Custody.RESIDENT:
        template, names = templates.RESIDENT, {"id": identity.key_id.bytes, "label": resident_label(identity.bound_to)}
    if spec.is_symmetric:
        capabilities = templates.use_capabilities(spec.key_type, spec.purpose)
        key = session.generate_key(
            pkcs11.KeyType.AES, spec.strength_bits, capabilities=capabilities, template=dict(template), **names
        )
        return None, key
    pair: Callable[..., tuple[Any, Any]] = _pair_source(session, spec)
    return pair(
        capabilities=templates.pair_capabilities(spec.purpose),
        public_template=dict(templates.SESSION_PUBLIC),
        private_template=dict(template),
        **names,
    )


def _pair_source(session: pkcs11.Session, spec: KeySpec) -> Callable[..., tuple[Any, Any]]:
    if spec.key_type is KeyType.RSA:
        return lambda **options: session.generate_keypair(pkcs11.KeyType.RSA, spec.strength_bits, **options)
    parameters = session.create_domain_parameters(
        mechanisms.P11_TYPE[spec.key_type], {Attribute.EC_PARAMS: mechanisms.CURVE_PARAMETERS[spec.key_type]}, local=True
    )
    return lambda **options: parameters.generate_keypair(mechanism=mechanisms.CURVE_GENERATION[spec.key_type], **options)


def _inner(session: TokenSession, identity: KeyIdentity, custody: Custody, private: Any) -> tuple[bytes, UUID]:  # noqa: ANN401  # the binding makes a class for each object
    if custody is Custody.WRAPPED:
        return session.kek(session.kek_id).wrap_key(private, mechanism=mechanisms.WRAP), session.kek_id
    if custody is Custody.RESIDENT:
        return identity.key_id.bytes, _NO_KEK
    if identity.spec.key_type is KeyType.RSA:
        raise unsupported("RSA keys whose value leaves it")
    value = bytes(private[Attribute.VALUE])
    # A scalar that begins with a zero byte may come back without it.
    return value.rjust(_SCALAR_BYTES, b"\0") if identity.spec.key_type in EC_TYPES else value, _NO_KEK


def _load(session: TokenSession, identity: KeyIdentity, envelope: Envelope, inner: bytes) -> Handle:
    spec = identity.spec
    match envelope.custody:
        case Custody.WRAPPED:
            return Handle(unwrap_for_use(session, spec, envelope.kek_id, inner), is_resident=False)
        case Custody.SEALED:
            return Handle(_import(session.raw, spec, inner), is_resident=False)
        case Custody.RESIDENT:
            found = find_resident(session.raw, inner)
            if len(found) != 1:
                raise MisfitError
            return Handle(found[0], is_resident=True)


def unwrap_for_use(session: TokenSession, spec: KeySpec, kek_id: UUID, wrapped: bytes) -> Any:  # noqa: ANN401  # as above
    """Return the session object that *wrapped* holds, fit for nothing but its purpose. Raises HSM_KEK_MISSING."""
    kind = ObjectClass.SECRET_KEY if spec.is_symmetric else ObjectClass.PRIVATE_KEY
    return session.kek(kek_id).unwrap_key(
        kind,
        mechanisms.P11_TYPE[spec.key_type],
        wrapped,
        mechanism=mechanisms.WRAP,
        capabilities=templates.use_capabilities(spec.key_type, spec.purpose),
        template=dict(templates.USE if spec.is_symmetric else templates.USE_PRIVATE),
    )


def _import(session: pkcs11.Session, spec: KeySpec, value: bytes) -> Any:  # noqa: ANN401  # as above
    common: dict[Attribute, Any] = {
        **templates.USE,
        Attribute.TOKEN: False,
        Attribute.KEY_TYPE: mechanisms.P11_TYPE[spec.key_type],
        Attribute.VALUE: value,
    }
    if spec.is_symmetric:
        operations = dict.fromkeys((Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.SIGN), True)
        return session.create_object({**common, **operations, Attribute.CLASS: ObjectClass.SECRET_KEY})
    parameters = mechanisms.CURVE_PARAMETERS[spec.key_type]
    return session.create_object(
        {
            **common,
            **templates.operation_attributes(spec.purpose),
            Attribute.CLASS: ObjectClass.PRIVATE_KEY,
            Attribute.EC_PARAMS: parameters,
        }
    )
