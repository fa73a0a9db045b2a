"""Making and using keys leaves nothing behind in the token or in its sessions."""

import asyncio

import pytest
from pkcs11 import Attribute

from kms.domain.algorithms import KeySpec, KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.keys import Custody
from kms.hsm import envelopes
from kms.hsm.session import TokenSession
from kms.hsm.token_hsm import TokenHsm
from tests.hsm.keys import new_key, use

AES = key_spec(KeyType.AES, Purpose.ENCRYPTION, None)
SPECS = (
    key_spec(KeyType.SECP256K1, Purpose.SIGNING, None),
    key_spec(KeyType.ED25519, Purpose.SIGNING, None),
    key_spec(KeyType.RSA, Purpose.ENCRYPTION, 2048),
    AES,
)


async def objects(hsm: TokenHsm, *, in_token: bool) -> int:
    """Return how many objects any session of this process sees."""

    def count(session: TokenSession) -> int:
        return len(list(session.raw.get_objects({Attribute.TOKEN: in_token})))

    return await asyncio.wrap_future(hsm._lanes.submit(lambda bench: bench.run(count, "a search")))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.key_type))
async def test_making_a_key_leaves_no_object(hsm: TokenHsm, spec: KeySpec) -> None:
    before = await objects(hsm, in_token=False), await objects(hsm, in_token=True)
    await new_key(hsm, spec)
    assert (await objects(hsm, in_token=False), await objects(hsm, in_token=True)) == before


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.key_type))
async def test_a_used_key_is_one_session_object(hsm: TokenHsm, spec: KeySpec) -> None:
    key = await new_key(hsm, spec)
    before = await objects(hsm, in_token=False)
    for _ in range(3):
        await use(hsm, key)
    assert await objects(hsm, in_token=False) == before + 1


async def test_a_resident_key_is_one_token_object_until_it_is_discarded(hsm: TokenHsm) -> None:
    before = await objects(hsm, in_token=True)
    key = await new_key(hsm, AES, Custody.RESIDENT)
    await use(hsm, key)
    assert await objects(hsm, in_token=True) == before + 1
    await hsm.discard(key.material)
    assert await objects(hsm, in_token=True) == before


@pytest.mark.parametrize("custody", [Custody.WRAPPED, Custody.RESIDENT])
async def test_a_generation_that_fails_half_way_leaves_no_object(
    hsm: TokenHsm, monkeypatch: pytest.MonkeyPatch, custody: Custody
) -> None:
    before = await objects(hsm, in_token=False), await objects(hsm, in_token=True)

    def broken(*_arguments: object) -> str:
        raise KmsError(Reason.HSM_UNAVAILABLE, "cut")

    monkeypatch.setattr(envelopes, "check_value", broken)
    with pytest.raises(KmsError, match="cut"):
        await new_key(hsm, AES, custody if custody is Custody.RESIDENT else None)
    assert (await objects(hsm, in_token=False), await objects(hsm, in_token=True)) == before
    assert hsm.status().resident_keys == 0
