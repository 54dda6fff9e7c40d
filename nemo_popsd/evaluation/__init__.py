"""Evaluation of generated text: final answers, epistemic markers, and summaries over problems."""
