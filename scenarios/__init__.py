"""HELM scenarios of our own, suites of run entries, named policies and the demo model.

- ``tasks/``: pure generators of examples, shared with the demo model's training
- one file per scenario, such as ``information_extraction.py``
- ``plugin.py``: imports them all; ``helm-run --plugins scenarios.plugin`` works, too
- ``run_entries_demo.conf``, ``run_entries_paper.conf``: suites in HELM's own format
- ``policies.yaml``: named policies
- ``demo/``: the bundled demo model and its recipe

To add a scenario, write one file and import it in ``plugin.py`` (or pass the file to ``--plugins``). Copy
`scenarios.information_extraction`: a task with text in and text out needs a generator and a subclass of
`scenarios.task_scenario.TaskScenario`. A scenario unlike these derives from HELM's ``Scenario`` and registers
a function with HELM's ``run_spec_function``, as `scenarios.demo_text` does.

Importing this package imports nothing.
"""
