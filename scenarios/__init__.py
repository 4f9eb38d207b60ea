"""What is asked: HELM scenarios of our own, suites of run entries, named policies, the demo model.

- ``tasks/``: pure generators of examples, shared with the demo model's training
- one file per scenario (``information_extraction.py``, ...): a HELM ``Scenario`` and its run spec function
- ``plugin.py``: imports them all; ``helm-run --plugins scenarios.plugin`` works too
- ``run_entries_demo.conf``, ``run_entries_paper.conf``: suites in HELM's own format
- ``policies.yaml``: named policies
- ``demo/``: the bundled demo model and its recipe

To add a scenario, write one file: a ``Scenario`` subclass and a function registered with HELM's
``run_spec_function``, then name it in ``plugin.py`` (or pass the file to ``--plugins``, with no change
here). `scenarios.information_extraction` is the example to copy: with `scenarios.task_scenario` a task
that has text in and text out needs a generator and a dozen lines. A scenario that is unlike these
derives from HELM's ``Scenario`` directly, as `scenarios.demo_text` does.

Importing this package imports nothing.
"""
