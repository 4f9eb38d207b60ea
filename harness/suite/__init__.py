"""A suite: many run entries, one model, one or more policies; from requests to a finished folder."""
