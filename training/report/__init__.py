"""HTML pages: adaptation, verdict, export, tracks."""
