"""A suite's report: one HTML page that stands alone, Markdown, pictures, figures as data."""
