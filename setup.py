"""Packaging of drum-hf. Ranges only; the exact set that is tested stands in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

#: Where the repository is shown, such as "https://github.com/OWNER/drum-hf"; set it before a release.
REPOSITORY = ""


def description(readme: str, repository: str) -> str:
    """The README for PyPI, where links into the repository lead nowhere unless they name it."""
    if not repository:
        return readme
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/HEAD/", readme)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/HEAD/", readme)


extras = {
    "plot": ["matplotlib>=3.8"],
    "bm25": ["bm25s>=0.2"],
    "app": ["gradio>=6"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.25"],
    # Replaces faiss-cpu: see the README for the install line.
    "gpu": ["faiss-gpu>=1.11"],
}
extras["demo"] = extras["plot"] + extras["bm25"]
extras["dev"] = [
    *extras["app"],
    *extras["demo"],
    *extras["docs"],
    "build>=1",
    "hypothesis>=6.100",
    "mypy>=1.10",
    "playwright>=1.40",
    "pre-commit>=3.7",
    "pycocoevalcap>=1.2",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "transformers[serving]>=5",
    "twine>=6",
]

setup(
    name="drum-hf",
    version="0.1.0.dev0",
    description="Learn which demonstrations your large vision-language model needs in its prompt, and retrieve them.",
    long_description=description((here / "README.md").read_text(encoding="utf-8"), REPOSITORY),
    long_description_content_type="text/markdown",
    author="The drum-hf authors",
    license="Apache-2.0",
    packages=find_packages(include=["drum_hf", "drum_hf.*"]),
    package_data={"drum_hf": ["py.typed", "playground/models/**/*", "experiments/suites/specs/*.yaml"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.1",
        "datasets>=4",
        "evaluate>=0.4.3",
        "faiss-cpu>=1.10",
        "httpx>=0.27",
        "huggingface_hub>=1.0",
        "numpy>=1.24",
        "peft>=0.17",
        "psutil>=5.9",
        "Pillow>=10",
        "PyYAML>=6",
        "pyarrow>=15",
        "regex>=2023.8",
        "requests>=2.28",
        "safetensors>=0.4.5",
        "scikit-learn>=1.3",
        "sentence-transformers>=6",
        "torch>=2.6",
        "tqdm>=4.65",
        "transformers>=5",
        "wrapt>=1.16",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["drum-hf=drum_hf.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="vision-language in-context-learning retrieval demonstrations huggingface",
    url=REPOSITORY or None,
    project_urls={
        "DRUM (paper)": "https://arxiv.org/abs/2412.07619",
        "ICL tuning (paper)": "https://arxiv.org/abs/2403.12736",
    },
)
