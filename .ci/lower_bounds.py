"""Prints the oldest releases that setup.cfg allows, as constraints for pip: `numpy>=1.26` becomes `numpy==1.26.*`."""

import configparser
import pathlib
import re

BOUND = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?>=(\d+(?:\.\d+)*)(?:,.*)?")

config = configparser.ConfigParser()
config.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
listed = [config["options"]["install_requires"], *config["options.extras_require"].values()]
for requirement in sorted({line.strip() for lines in listed for line in lines.splitlines()}):
    if bound := BOUND.fullmatch(requirement):
        print(f"{bound[1]}=={bound[2]}.*")
