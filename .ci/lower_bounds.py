"""Prints the oldest versions that setup.cfg allows, as constraints for pip: `numpy>=1.26` becomes `numpy==1.26.*`."""

import configparser
import pathlib
import re

BOUND = re.compile(r"^([\w-]+)(?:\[[\w,-]+\])?>=([\d.]+)")

config = configparser.ConfigParser()
config.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
listed = [config["options"]["install_requires"], *config["options.extras_require"].values()]
for line in sorted({line.strip() for text in listed for line in text.splitlines()}):
    if bound := BOUND.match(line):
        print(f"{bound[1]}=={bound[2]}.*")
