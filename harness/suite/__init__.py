"""A suite: many HELM run entries, one model, one or more policies.

Its steps are public: `requests.build_requests`, `policy_run.answer`, `scoring.score` and `runner.write`.
`runner.run_suite` calls them for every policy; whoever needs only some of them calls those.
"""
