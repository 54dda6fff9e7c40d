"""The text side of evaluation: final answers, epistemic markers, and summaries over problems."""
