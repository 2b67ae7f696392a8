"""The web explorer behind ``vtr explore``: a picture, a method, and the tokens that are left.

:mod:`vtr.explore.compute` and what it uses need no web library; :mod:`vtr.explore.app` is the page, in Gradio.
"""
