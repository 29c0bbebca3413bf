"""What an evaluation shows: measures on arrays (pure), plots, the sheet of worst mistakes, and the HTML page."""
