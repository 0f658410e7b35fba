"""The charts of a comparison's page, a line each, in the order of the page: what is imported here is on it, and an image."""
# ruff: noqa: I001

from muonwire.compare.report.curves import LOSS_BY_STEPS as LOSS_BY_STEPS
from muonwire.compare.report.curves import LOSS_BY_BYTES as LOSS_BY_BYTES
from muonwire.compare.report.frontier import LOSS_BY_BITS as LOSS_BY_BITS
from muonwire.compare.report.curves import LOSS_BY_LINK_TIME as LOSS_BY_LINK_TIME
from muonwire.compare.report.curves import LOSS_BY_MEASURED_TIME as LOSS_BY_MEASURED_TIME
from muonwire.compare.report.breakdown import TIME_AT_LINK as TIME_AT_LINK
from muonwire.compare.report.breakdown import TIME_MEASURED as TIME_MEASURED
from muonwire.compare.report.rates import LOSS_BY_RATE as LOSS_BY_RATE
