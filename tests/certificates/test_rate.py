"""The bound rate of what is signed on demand."""

from kms.certificates.publishing.rate import Bucket


def test_so_many_are_taken_at_once_and_so_many_a_second_afterwards() -> None:
    seconds = 0.0
    bucket = Bucket(2.0, 3, lambda: seconds)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    seconds = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    seconds = 0.9
    assert not bucket.take()
    seconds = 1_000.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False], "what is not taken is not saved up"
