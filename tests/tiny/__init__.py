"""Models, data and runs small enough for tests: a module a subject. Every family: tests/tiny_pipelines/."""
