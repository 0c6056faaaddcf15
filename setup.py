"""Reads settings.ini, the one place for metadata, and maps what ships beside the module into the wheel."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
shipped = {"aevlp.assets": "data", "aevlp.experiments": "nbs/experiments", "aevlp.tutorials": "nbs/tutorials"}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=["aevlp", *shipped],
    package_dir={"aevlp": "aevlp", **shipped},
    package_data={
        "aevlp.assets": ["*.safetensors", "*.json", "*.txt", "*.md", "*/*.txt"],
        "aevlp.experiments": ["*.ipynb", "*.yaml"],
        "aevlp.tutorials": ["*.ipynb"],
    },
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],  # lets the docs link `names` to their pages
    },
)
