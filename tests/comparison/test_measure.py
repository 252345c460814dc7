from convai_fast.comparison.measure import Figures, Way, Workload, measure


def test_the_ways_take_turns_and_both_do_the_work_of_the_same_turn():
    done = []
    ours = Way(lambda turn: done.append(("ours", turn)), 1)
    theirs = Way(lambda turn: done.append(("theirs", turn)), 1)
    figures = measure(Workload("work", "things", ours, theirs, ""), seconds=0)
    assert done == [("theirs", 0), ("ours", 0), ("theirs", 1), ("ours", 1)]
    assert len(figures.ours) == len(figures.theirs) == 2


def test_a_ratio_is_that_of_pairs():
    figures = Figures("work", "things", "", ours=[8.0, 9.0, 40.0], theirs=[4.0, 3.0, 10.0])
    assert figures.ratio == (3.0, 2.0, 4.0)
    assert str(figures).endswith(" 4.00         9.00    3.0 x  (2.0-4.0, 3 pairs)")


def test_more_units_in_the_same_time_are_a_higher_speed():
    workload = Workload("work", "things", Way(lambda _: None, 1e12), Way(lambda _: None, 1), "")
    assert measure(workload, seconds=0).ratio[1] > 1e6
