"""The report of a comparison: losses, their costs, and reasons."""

from muonwire.compare.report.page import compare_page, write_compare_report
from muonwire.compare.report.results import CURVE_COLUMNS, read_results
from muonwire.compare.report.setting import ReportSetting

__all__ = ["CURVE_COLUMNS", "ReportSetting", "compare_page", "read_results", "write_compare_report"]
