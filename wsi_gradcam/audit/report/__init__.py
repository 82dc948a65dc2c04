"""The report of an audit: one page for the archive and one for each slide, without scripts or other files."""
