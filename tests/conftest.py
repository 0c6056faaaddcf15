"""What more than one file of tests begins with; most bring pictures of their own."""

import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def one_thread():
    """As runs on small pictures have it, for the digits of the loops beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Coloured squares."""
    return tiny.shapes(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a finished run on them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny.train(folder, "gpr+random", data)
    return folder
