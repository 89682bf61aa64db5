"""Traces and models under controls: widgets for JupyterLab and VS Code, each of which is also a page of its own.

Every widget is a Python class with traits that can be read and set, and a plain script beside it. They ask no server for
anything, and say inside themselves what is missing.
"""
