"""Singular values by their place."""

import torch

from muonwire.lab.measures.spectrum import PLACES, spectrum_plot, spectrum_rows


def test_the_first_place_has_the_largest_value_and_the_last_the_smallest():
    x = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    rows = spectrum_rows(x, {"data": "made"})
    assert [row["place"] for row in rows] == list(PLACES)
    assert {row["data"] for row in rows} == {"made"}
    assert (rows[0]["singular"], rows[5]["singular"], rows[-1]["singular"]) == (1.0, 0.5, 0.25)
    whole = spectrum_rows(x, {}, over_largest=False)
    assert (whole[0]["singular"], whole[-1]["singular"]) == (4.0, 1.0)


def test_the_plot_says_what_its_series_are():
    plot = spectrum_plot("s", title="t", series=("density", "Density"), remark="1 is before.")
    assert plot.how_to_read.endswith("the smallest. 1 is before.")
    assert (plot.x[0], plot.y[0], plot.log_y) == ("place", "singular", True)
