"""The planner's report: one self-contained HTML page, drawn from plain numbers.

    ReportData --> render --> str            (data.py says what a page can hold; sections without data are left out)

Nothing here computes a plan. The page is a template (templates/page.html), its figures are drawn in charts/.
"""
