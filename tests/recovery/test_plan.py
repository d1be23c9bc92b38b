"""What a recovery plans to do with the memory there is."""

import pytest

from wina_calib.errors import UsageError
from wina_calib.recovery.options import RecoverOptions
from wina_calib.recovery.plan import Size, plan_training

SIZE = Size(
    weights=10**9,
    trained=8 * 10**8,
    projections=10**6,
    layers=24,
    width=2048,
    inner=8192,
    vocabulary=150_000,
    itemsize=2,
)


def test_a_plan_takes_what_fits() -> None:
    options = RecoverOptions()
    large = plan_training(SIZE, options, 120 << 30)
    assert (large.adapters, large.micro_batch, large.again) == (False, 8, False)
    less = plan_training(SIZE, options, 40 << 30)
    assert (less.adapters, less.micro_batch, less.again) == (False, 8, True)
    assert "computed again" in less.describe(options, 40 << 30)
    assert plan_training(SIZE, options, 12 << 30).adapters
    with pytest.raises(UsageError, match=r"needs about .* GB .* 1\.1 GB is available"):
        plan_training(SIZE, options, 1 << 30)
    with pytest.raises(UsageError, match="available"):
        plan_training(SIZE, RecoverOptions(train="all"), 12 << 30)


def test_memory_that_nobody_knows_refuses_nothing() -> None:
    assert not plan_training(SIZE, RecoverOptions(), 0).adapters


def test_processes_share_a_batch_evenly() -> None:
    assert plan_training(SIZE, RecoverOptions(), 120 << 30, processes=4).micro_batch == 2
    with pytest.raises(UsageError, match="batch of 8 cannot be shared by 3 processes"):
        plan_training(SIZE, RecoverOptions(), 120 << 30, processes=3)


def test_weights_are_spread_over_processes_where_one_cannot_hold_them() -> None:
    options = RecoverOptions()
    assert not plan_training(SIZE, options, 120 << 30, processes=4).sharded
    spread = plan_training(SIZE, options, 16 << 30, processes=4)
    assert (spread.sharded, spread.adapters) == (True, False)
    assert "spread over the processes" in spread.describe(options, 16 << 30)
    assert plan_training(SIZE, options, 16 << 30).adapters
    assert plan_training(SIZE, RecoverOptions(bits=4), 16 << 30, processes=4).adapters
    assert plan_training(SIZE, RecoverOptions(train="sharded"), 120 << 30, processes=2).sharded
    for train in (RecoverOptions(train="sharded"), RecoverOptions(train="sharded", bits=4)):
        with pytest.raises(UsageError, match="for several processes"):
            plan_training(SIZE, train, 120 << 30, processes=2 if train.bits else 1)
