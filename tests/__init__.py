"""The tests; a package so that ranks can import `tests.multirank...` whatever else is called `tests`."""
