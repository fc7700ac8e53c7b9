import pytest

from ch16.parts.autoscaling.hpa import History, Policy, Rules, Spec

UP = Rules((Policy("Pods", 4, 15),), 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Spec(0, 5),
        lambda: Spec(6, 5),
        lambda: Spec(1, 5, Rules((), 0)),
        lambda: Spec(1, 5, Rules((Policy("Replicas", 1, 15),), 0)),
        lambda: Spec(1, 5, Rules((Policy("Pods", 0, 15),), 0)),
        lambda: Spec(1, 5, Rules((Policy("Pods", 1, 1801),), 0)),
        lambda: Spec(1, 5, Rules((Policy("Pods", 4, 60),), 3601)),
        lambda: Spec(1, 5, Rules((Policy("Pods", 4, 60),), 0, "Maximum")),
    ],
)
def test_what_the_api_server_refuses(make):
    with pytest.raises(ValueError):
        make()


def test_a_controller_remembers_as_far_back_as_its_windows_and_periods_reach():
    spec = Spec(1, 9, UP, Rules((Policy("Percent", 100, 60),), 300))
    history = History().after(spec, 0, 5, 2).after(spec, 100, 6, 0).after(spec, 300, None, -1)
    assert history == History(((100, 6),), ((300, -1),))
