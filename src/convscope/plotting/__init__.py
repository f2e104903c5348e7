"""Figures and saved images of results, one module per kind of result.

For each class of results there is a function ``draw_*``, which returns the figure of `Result.figure`, and a function
``render_*``, which yields the files of `Result.save`. `convscope.figures.PLOTTING_MODULES` maps classes to modules.
"""
