"""Summary and curves are checked before anything is drawn."""

import polars as pl
import pytest

from muonwire.compare.report.results import read_results
from muonwire.errors import UsageError
from tests.compare.report.made_comparisons import FOUR, make_results, make_setting


def test_not_finite_means_diverged():
    summary, curves = make_results(FOUR[:2])
    summary[0]["final_eval_loss"] = float("nan")
    results = read_results(summary, curves)
    assert [r.recipe for r in results.ranking] == ["muon"]
    assert results.ordered[-1].loss is None
    assert results.curves["eval_loss"].is_nan().sum() == 0


def test_means_stop_where_a_seed_has_no_loss():
    summary, curves = make_results(FOUR[:1], seeds=(0, 1))
    lost = (pl.col("seed") == 1) & (pl.col("step") > 200)
    curves = curves.with_columns(pl.when(lost).then(None).otherwise(pl.col("eval_loss")).alias("eval_loss"))
    means = read_results(summary, curves).mean_curves()
    assert means["step"].max() == 200
    assert (means["low"] <= means["eval_loss"]).all()
    assert (means["eval_loss"] <= means["high"]).all()


def test_bad_input_is_named():
    summary, curves = make_results(FOUR[:1])
    with pytest.raises(UsageError, match="summary is empty"):
        read_results([], curves)
    with pytest.raises(UsageError, match="link_s"):
        read_results(summary, curves.drop("link_s"))
    with pytest.raises(UsageError, match=r"lacks.*chain"):
        read_results([{k: v for k, v in summary[0].items() if k != "chain"}], curves)
    with pytest.raises(UsageError, match="'adamw' with seed 0 twice"):
        read_results(summary * 2, curves)
    with pytest.raises(UsageError, match="seeds is empty"):
        make_setting(seeds=())
    with pytest.raises(UsageError, match="replicas is 0"):
        make_setting(replicas=0)
