"""Figures of results: ``draw_*`` functions for `Result.figure`, ``render_*`` functions for `Result.save`."""
