import pytest

from common import plots
from common.gpu import Machine

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)


@pytest.mark.parametrize("axes", [0, 3])
def test_a_picture_has_one_plot_or_two(axes):
    with pytest.raises(ValueError, match="one or two"):
        plots.draw(axes)


def test_the_title_has_message_model_machine_and_whether_it_is_simulated(tmp_path):
    for simulated in (False, True):
        figure, (left, _) = plots.draw(2)
        left.plot([1, 2], label="a line")
        plots.legend_below(left)
        plots.save_plot(figure, str(tmp_path / "x" / "plot.png"), "It grows", "a model", CPU, simulated)
        assert (tmp_path / "x" / "plot.png").read_bytes().startswith(b"\x89PNG")
        title = figure.get_suptitle()
        assert title.splitlines() == ["It grows", "a model, a CPU, 2 cores" + ("; simulated" if simulated else "")]


def test_a_legend_below_hides_no_data():
    figure, (axis,) = plots.draw(1)
    axis.plot([1, 2], label="a line")
    plots.legend_below(axis)
    figure.draw_without_rendering()
    assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0


def test_small_letters_are_refused(tmp_path):
    figure, (axis,) = plots.draw(1)
    axis.text(0, 0, "tiny", fontsize=8)
    with pytest.raises(ValueError, match="less than 14 points: tiny"):
        plots.save_plot(figure, str(tmp_path / "plot.png"), "It grows", "a model", CPU)
