"""A seeded fuzzer of everything between a ``.nemo`` file and the reward in it.

``seeds`` makes good archives, ``tar_cases``, ``yaml_cases``, ``pickle_cases``, ``zip_cases`` and ``reward_cases`` spoil
them (case ``n`` of a series is always the same bytes), ``worker`` restores the result under ``guard``, and ``python -m
tests.fuzz`` runs many and prints figures by category. The properties are those of docs/security.md: no code runs,
nothing is written, memory and time stay bounded, and the end is either one of our own exceptions or a reward with the
very weights that went in.
"""
