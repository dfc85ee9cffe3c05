"""The YAML that Hydra composes over the schemas of ``gpt.config`` and ``launch.config``. A package: wheels carry it."""
