"""The run report: run folders -> what is known of them (runs) -> charts, videos and tables -> one HTML file (page).

What the page looks like is in assets/report: a template, a style sheet and the script that draws the charts.
"""
