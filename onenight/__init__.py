"""The package behind the stage scripts, in four groups.

From the bottom up, each importing only those before it, model.py and configurator.py:

- ``system``: the console, files, locks, the device, several processes
- ``data``: from parquet files to windows of tokens
- ``models``: checkpoints, Hugging Face's formats, generating text
- ``training``: one run, from its settings to its records

``startup`` comes before all of them: every script imports it first.
"""
