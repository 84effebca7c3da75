"""What commands show while a session works."""

import io
import json

import rich.console

from diffussm_cli.commands import console
from diffussm_cli.events import FirstStep, Message, Stage, TrainingRecord, Warned


def test_long_work_shows_its_duration(monkeypatch, capsys):
    """After the first part and once; nothing where it is short."""
    for seconds, words in ((1.0, ""), (36.0, "image: 990 more will take about 59 min\n")):
        clock = iter([0.0, seconds, 2 * seconds])
        monkeypatch.setattr(console.time, "perf_counter", lambda clock=clock: next(clock))
        with console.bar(console.make_console(), 1000 if words else 30) as advance:
            advance(10)
            advance(10)
        monkeypatch.undo()
        said = [
            line for line in capsys.readouterr().err.splitlines(keepends=True) if "more" in line
        ]
        assert said == ([words] if words else [])
    lengths = {
        13: "13 s",
        89: "89 s",
        90: "1.5 min",
        5000: "83 min",
        8000: "2.2 h",
        200_000: "2.3 days",
        9e6: "104 days",
    }
    assert {seconds: console.duration(seconds) for seconds in lengths} == lengths


def followed(events, value=None):
    """What `follow` gives, and what it shows, line by line, on a console that is no terminal."""
    shown = io.StringIO()
    shown_on = rich.console.Console(
        file=shown, markup=False, emoji=False, highlight=False, soft_wrap=True
    )

    def session():
        yield from events
        return value

    found = console.follow(shown_on, session())
    return found, [line for line in shown.getvalue().splitlines() if line.strip()]


def test_follow_shows_lines_verbatim_and_returns_the_value_of_its_session():
    found, lines = followed([Stage("loading"), Message("a [b]:cat:"), Warned("careful")], 7)
    assert found == 7
    assert lines == ["a [b]:cat:", "warning: careful"]
    assert followed([Message("x")]) == (None, ["x"])


def test_record_is_one_line_with_its_metrics():
    record = {"step": 2, "loss": 0.5, "images_per_second": 9.0}
    more = record | {"step": 4, "held_out": 0.25, "eval/fid": 3.0}
    _, lines = followed([TrainingRecord(record, 4), TrainingRecord(more, 4)])
    shown = [line for line in lines if line.startswith("step ")]
    assert shown[0] == "step 2/4  0:00  loss 0.5000  9.0 images/s"
    assert shown[1] == "step 4/4  0:00  loss 0.5000  9.0 images/s  held-out 0.2500  FID 3"


def test_record_without_terminal_follows_warning_of_skipped_steps():
    record = {"step": 2, "loss": 0.12345, "images_per_second": 9.96, "eval/fid": 3.0}
    _, lines = followed([TrainingRecord(record | {"left_out": [1]}, 4)])
    warning, last = [line for line in lines if line.startswith("warning") or "  loss " in line][:2]
    assert warning.rpartition(": ")[2] == "[1]"
    assert last == "step 2/4  0:00  loss 0.1235  10.0 images/s  FID 3"


def test_remaining_time_is_shown_from_the_first_step_on_a_terminal(monkeypatch):
    """A step of 10 s of 40, and none of a log every hundred steps."""
    at = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: at[0])
    shown = io.StringIO()
    terminal = rich.console.Console(
        file=shown, force_terminal=True, width=80, get_time=lambda: at[0]
    )

    def session():
        yield Stage("training")
        at[0] = 110.0
        yield FirstStep(40, 0)

    console.follow(terminal, session())
    assert "0:10, 6:30 left" in shown.getvalue()
    assert followed([FirstStep(40, 0)]) == (None, [])


def test_bar_is_one_line_at_80_columns_and_keeps_its_times():
    news = "loss 1.8912  28.3 images/s  held-out 1.9125  FID 12.3"
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80)
    with console._progress_bar(terminal, "step") as bars:
        task = {"news": news, "before": 0.0, "after": 1000.0, "done": 400}
        bars.add_task("", total=2000, completed=400, **task)
        text = io.StringIO()
        rich.console.Console(file=text, width=80).print(bars.get_renderable())
    (line,) = text.getvalue().splitlines()
    assert "400/2000" in line
    assert "left loss 1.8912  28.3 images/s" in line
    assert line.rstrip().endswith("…")


def test_control_characters_alone_are_escaped():
    """Letters, accents, full-width spaces and line breaks stay; escapes, bells and reversals of
    writing do not.
    """
    assert (
        console.printable("caf\u00e9 \u6f22\u3000\u5b57\n\tx")
        == "caf\u00e9 \u6f22\u3000\u5b57\n\tx"
    )
    assert console.printable("\x1b[2J\x07\r\x9b\u202ea\udce9") == r"\x1b[2J\x07\r\x9b\u202ea\udce9"


def test_every_path_to_terminal_escapes_control_characters(capsys):
    """A line, a cell and title of a table, a spinner and a bar."""
    from rich.table import Table

    foreign = "a\x1b]0;b[red]"
    shown = console.make_console()
    shown.print(foreign)
    table = Table(foreign, title=foreign)
    table.add_row(foreign)
    shown.print(table)
    with console.bar(shown, 2, foreign) as advance:
        advance(1, foreign)
    console.follow(shown, (event for event in [Stage(foreign), Message(foreign)]))
    console.say(foreign)
    said = capsys.readouterr()
    assert said.err.count(r"a\x1b]0;b") >= 7  # a cell, which is as wide as the text was, is cut
    assert said.out == "a\\x1b]0;b[red]\n"
    assert "\x1b" not in said.out + said.err


def test_json_with_values_that_are_not_finite_is_valid(capsys):
    value = {"a": [1.0, float("nan"), (float("inf"), 2)], "b": "NaN"}
    console.print_json(value, console.make_console())
    said = capsys.readouterr()

    def refuse(text):
        raise ValueError(text)

    assert json.loads(said.out, parse_constant=refuse) == {"a": [1.0, None, [None, 2]], "b": "NaN"}
    assert said.err == "warning: 2 numbers are not finite; they are null in the JSON\n"


def test_bar_shows_elapsed_and_remaining_time_from_the_first_advance(monkeypatch):
    """10 of 40 steps took 20 seconds, 5 of them before there was a bar, so 60 are left; and ten
    seconds later 50.
    """
    at = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: at[0])
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "get_time", lambda: at[0])
    at[0] = 105.0
    seen = []
    record = {"step": 30, "loss": 0.5, "images_per_second": 9.0}
    with console._step_bar(terminal, TrainingRecord(record, 60, 20), start=100.0) as show:
        bars = terminal._live_stack[-1].get_renderable
        for now, step in ((105.0, None), (120.0, 30), (130.0, None), (3720.0, 40)):
            at[0] = now
            if step:
                show(step, "news")
            text = io.StringIO()
            rich.console.Console(file=text, width=120).print(bars())
            seen.append(text.getvalue())
    assert [line.split("/60")[0].split()[-1] for line in seen] == ["20", "30", "30", "40"]
    times = ["0:05", "0:20, 1:00 left", "0:30, 0:50 left", "1:00:20, 1:00:20 left"]
    assert all(time in line for time, line in zip(times, seen)), seen
    assert "left" not in seen[0]
