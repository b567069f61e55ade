"""The story of a run or a checkpoint on one page: HTML, Markdown or JSON."""

from .collect import Report, collect_report
from .html import to_html
from .markdown import to_markdown

__all__ = ["Report", "collect_report", "to_html", "to_markdown"]
