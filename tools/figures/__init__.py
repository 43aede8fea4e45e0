"""Figures and tables of studies and runs: load.py reads them, gallery.py draws them, report.py
writes the page. tools/plot and tools/report are the ways in."""
