"""The run report: `runs` reads run folders, `charts` and `media` prepare curves and videos, `page` writes one HTML
file.

The look of the page is in assets/report: a template, a style sheet and the script that draws the charts.
"""
