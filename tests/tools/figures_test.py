"""tools/plot and tools/report on made-up studies and runs, whole, partial and damaged."""
import functools
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

import numpy

HERE = pathlib.Path(__file__).resolve().parent
TOOLS = HERE.parents[1] / "tools"
sys.path[:0] = [str(HERE), str(TOOLS)]

from figures.area import areas, describe_areas
from figures.load import load
from figures.study import Run, Study
from figures.style import NAMES, balanced, method_look
from figures.table import table
from figures.tradeoff import draw_time
from study_file import add_run, numbers, write_run, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ALL = {"sparsity", "time", "training", "heads", "position", "routing"}


def call(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.results = self.folder / "results.h5"

    def succeed(self, tool, *arguments):
        result = call(tool, *arguments)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return result.stdout

    def refuse(self, text, *arguments):
        for tool in ("plot", "report"):
            result = call(tool, *arguments[:1] if tool == "report" else arguments)
            self.assertEqual((result.returncode, result.stdout), (1, ""))
            self.assertRegex(result.stderr, f"^tools/{tool}: [^\n]*{text}[^\n]*\n$")

    def assert_figures(self, folder, names):
        self.assertEqual({path.name for path in folder.iterdir()},
                         {f"{name}.{kind}" for name in names for kind in ("png", "svg")})
        for name in names:
            head = (folder / f"{name}.png").read_bytes()[:24]
            self.assertEqual(head[:8], b"\x89PNG\r\n\x1a\n")
            self.assertTrue(all(side > 300 for side in struct.unpack(">II", head[16:])))
            self.assertIn("</svg>", (folder / f"{name}.svg").read_text())


class Studies(InFolder):
    def test_a_whole_study_gets_every_figure_and_the_table(self):
        write_study(self.results).close()
        out = self.succeed("plot", self.folder)
        self.assert_figures(self.folder / "figures", ALL)
        for name in ALL:
            self.assertIn(str(self.folder / "figures" / f"{name}.svg"), out)
        self.assertRegex(out, r"\nDashAttention, target_density 0.25 +2 +0\.25")
        self.assertRegex(out, r"\nNSA, topk 4 +2 +0\.1")
        self.assertIn("python-docs, continued from a dense model, 4 layers of width 128", out)
        self.assertIn("over sparsity", out)
        self.assertIn("over attention time", out)
        self.assertNotIn("missing", out)
        order = [out.index(f"\n{name}") for name in
                 ("before: full", "full", "DashAttention, target_density 0.5", "NSA", "InfLLM-V2")]
        self.assertEqual(order, sorted(order))

    def test_the_same_study_gives_the_same_bytes(self):
        write_study(self.results).close()
        one, two = (self.succeed("report", self.results, "--out", self.folder / name) and
                    (self.folder / name).read_bytes() for name in ("one.html", "two.html"))
        self.assertEqual(one, two)

    def test_absent_data_leave_figures_out_and_it_is_said(self):
        write_study(self.results, optional=False).close()
        out = self.succeed("plot", self.results, "--out", self.folder / "here")
        self.assert_figures(self.folder / "here", {"sparsity", "training"})
        for name in ALL - {"sparsity", "training"}:
            self.assertIn(f"no figure `{name}`: ", out)
        self.assertNotIn("attention ms", out)

    def test_one_run_is_a_study(self):
        with write_study(self.results, methods=(), seeds=()) as file:
            add_run(file, "only", "dash", 1, 5)
        out = self.succeed("plot", self.folder)
        self.assert_figures(self.folder / "figures", ALL)
        self.assertIn("No area", out)
        self.assertIn("seed 5", out)

    def test_full_attention_alone_has_no_tradeoff(self):
        write_study(self.results, methods=("full",)).close()
        out = self.succeed("plot", self.folder)
        self.assert_figures(self.folder / "figures", {"training", "position"})
        self.assertIn("no figure `sparsity`: there is full attention alone", out)

    def test_a_method_it_does_not_know_is_drawn_under_its_own_name(self):
        with write_study(self.results, methods=("full", "nsa")) as file:
            for group in file["runs"].values():
                if group.attrs["method"] == b"nsa":
                    group.attrs["method"] = "newcomer"
        self.assertIn("\nnewcomer, topk 4 ", self.succeed("plot", self.folder))

    def test_no_two_methods_look_the_same(self):
        methods = ["mine", "nsa", "other"]
        looks = [method_look(method, methods) for method in [*NAMES, *methods] if method != "full"]
        self.assertEqual(len({str(look) for look in looks}), 5)  # nsa twice
        self.assertEqual(method_look("nsa", methods), method_look("nsa", []))

    def test_titles_break_after_commas_into_lines_alike(self):
        for text, lines in {
                "docs, sequences of 1024 tokens, 4 layers, 40 steps, seed 1":
                    ["docs, sequences of 1024 tokens,", "4 layers, 40 steps, seed 1"],
                "seed 1, a-part-that-no-line-of-half-the-length-holds":
                    ["seed 1,", "a-part-that-no-line-of-half-the-length-holds"]}.items():
            self.assertEqual([line.replace("\N{NO-BREAK SPACE}", " ")
                              for line in balanced(text, 50)], lines)

    def test_blocks_are_counted_where_they_are_chosen(self):
        write_study(self.results).close()
        columns, rows = table(load([self.folder]))
        at = [column.heading for column in columns].index("active blocks")
        for name, _, cells in rows:
            self.assertEqual(cells[at] == "", name.endswith("full attention"), name)

    def test_curves_over_time_go_from_dense_to_sparse(self):
        with write_study(self.results, seeds=(1,)) as file:
            for setting, time in enumerate((20.0, 30.0, 10.0)):
                file[f"runs/nsa-{setting}-seed1"].attrs["attention_ms"] = time
        axes = draw_time(load([self.folder])).axes[0]
        curve = next(line for line in axes.get_lines() if line.get_label() == "NSA")
        self.assertEqual(list(curve.get_xdata()), [20.0, 30.0, 10.0])

    def test_missing_and_diverged_runs_are_said(self):
        with write_study(self.results) as file:
            del file["runs/nsa-1-seed2"]
            del file["runs/dash-0-seed1"]
            for key in ("loss", "perplexity"):
                file["runs/infllmv2-2-seed1"].attrs[key] = numpy.nan
        out = self.succeed("plot", self.folder)
        self.assert_figures(self.folder / "figures", ALL)
        self.assertIn("2 of 22 runs are missing: DashAttention, target_density 0.5, seed 1; "
                      "NSA, topk 8, seed 2", out)
        self.assertIn("infllmv2-2-seed1 is not finite", out)
        self.assertRegex(out, r"\nInfLLM-V2, topk 4 .*nan")

    def test_a_run_without_a_result_is_missing(self):
        with write_study(self.results, seeds=(1,)) as file:
            del file["runs/nsa-1-seed1"].attrs["loss"]
        self.assertIn("1 of 11 runs are missing: nsa-1-seed1", self.succeed("plot", self.folder))

    def test_damaged_and_foreign_files_are_refused_in_a_line(self):
        self.refuse("neither a study .results.h5. nor a run", self.folder)
        self.refuse("neither a study", self.folder / "nowhere")
        write_study(self.results).close()
        whole = self.results.read_bytes()
        for damaged in (whole[:2000], b"not HDF5", b""):
            self.results.write_bytes(damaged)
            self.refuse("results.h5 is no study's results", self.folder)
        faults = {"format": lambda file: file.attrs.__setitem__("format", "another"),
                  "method": lambda file: file["runs/dash-0-seed1"].attrs.__delitem__("method"),
                  "finished": lambda file: file.__delitem__("runs"),
                  "shape": lambda file: file["runs/dash-0-seed1"].move("eval/density",
                                                                       "training/loss")}
        for word, fault in faults.items():
            with self.subTest(word):
                with write_study(self.results) as file:
                    del file["runs/dash-0-seed1/training/loss"]
                    fault(file)
                self.refuse(word, self.folder)
        self.assertFalse((self.folder / "figures").exists())
        self.assertFalse((self.folder / "report.html").exists())


class Runs(InFolder):
    def test_runs_side_by_side(self):
        folders = [write_run(self.folder / "start", "full"),
                   write_run(self.folder / "dense", "full", start="runs/start"),
                   write_run(self.folder / "half", "dash", 0, start="runs/start"),
                   write_run(self.folder / "quarter", "dash", 1, start="runs/start"),
                   write_run(self.folder / "going", "nsa", evaluated=False, start="runs/start")]
        out = self.succeed("plot", *folders, "--out", self.folder / "figures")
        self.assert_figures(self.folder / "figures", ALL - {"routing"})
        for name in ("before: full attention", "full attention", "DashAttention, target_density 0.5"):
            self.assertIn(f"\n{name} ", out)
        self.assertNotIn("\nNSA ", out)  # not evaluated
        self.assertRegex(out, r"\nDashAttention: 0\.00")

    def test_a_run_of_a_sweep_is_read_as_one_evaluated_apart(self):
        run = write_run(self.folder / "run", "dash")
        expected = self.succeed("plot", run)
        evaluation = run / "eval.json"
        (run / "result.json").write_text(f'{{"method": "dash", "eval": {evaluation.read_text()}}}')
        evaluation.unlink()
        self.assertEqual(self.succeed("plot", run), expected)
        self.assertIn("\nDashAttention ", expected)
        (run / "result.json").write_text("{}")
        self.refuse("result.json is no result of `entrain sweep`: it lacks 'eval'", run)

    def test_attention_time_is_that_of_a_sequence_on_its_rank(self):
        run = write_run(self.folder / "run", "dash")
        measured = numbers("dash", 0, 1)[0]["attention_ms"]
        self.assertAlmostEqual(load([run]).runs[0].values["attention_ms"], measured)
        shutil.rmtree(run / "checkpoints")  # which know the number of ranks
        self.assertNotIn("attention_ms", load([run]).runs[0].values)

    def test_runs_that_set_the_same_go_by_their_names(self):
        folders = [write_run(self.folder / name, "dash") for name in ("one", "two")]
        out = self.succeed("plot", *folders, "--out", self.folder / "figures")
        self.assertIn("\nDashAttention, run one ", out)
        self.assertIn("\nDashAttention, run two ", out)

    def test_a_run_without_an_evaluation_has_training_curves(self):
        run = write_run(self.folder / "run", "dash", evaluated=False)
        self.succeed("plot", run)
        self.assert_figures(run / "figures", {"training"})
        page = pathlib.Path(self.succeed("report", run).strip()).read_text()
        self.assertIn("Not evaluated yet", page)
        self.assertIn("Code version: 0.1 (def)", page)

    def test_damaged_runs_are_refused_in_a_line(self):
        run = write_run(self.folder / "run", "dash")
        for name, text, word in (("eval.json", "{", "eval.json is no output"),
                                 ("eval.json", "[1]", "eval.json is no output"),
                                 ("metrics.jsonl", "{\"step\n", "run is no run"),
                                 ("metrics.jsonl", "{\"loss\": 1}\n", "lacks 'step'"),
                                 ("metrics.jsonl", "", "no training step")):
            with self.subTest(name=name, text=text):
                shutil.rmtree(run)
                write_run(run, "dash")
                (run / name).write_text(text)
                self.refuse(word, run)

    def test_a_study_is_drawn_alone_and_several_runs_need_a_folder(self):
        run = write_run(self.folder / "run", "dash")
        write_study(self.results).close()
        result = call("plot", self.folder, run, "--out", self.folder / "figures")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, "^tools/plot: .*a study is drawn alone.*\n$")
        self.assertEqual(call("plot", run, run).returncode, 2)


class Reports(InFolder):
    def report(self):
        path = pathlib.Path(self.succeed("report", self.folder).strip())
        self.assertEqual(path, self.folder / "report.html")
        return path

    def test_it_stands_alone_and_quotes_what_it_shows(self):
        write_study(self.results).close()
        text = self.report().read_text()
        self.assertEqual(re.findall(r"(?:src|href)=\"(?!data:)|https?:|url\(|@import", text), [])
        self.assertEqual(set(re.findall(r'<figure id="(\w+)"', text)), ALL)
        self.assertIn("note: &lt;b&gt;&amp; not a tag&lt;/b&gt;", text)
        self.assertNotIn("<b>", text)
        self.assertIn("Code version: 0.1 (abc)", text)
        self.assertIn("<summary>dash-0-seed1</summary>", text)

    @unittest.skipUnless(CHROMIUM, "no chromium here: the report is not opened in a browser")
    def test_a_browser_draws_every_figure_and_complains_of_nothing(self):
        write_study(self.results).close()
        result = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={self.folder / 'browser'}", "--dump-dom", self.report().as_uri()],
            capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(re.findall(r".*CONSOLE.*", result.stderr), [])
        self.assertIn(f'<body data-figures="{len(ALL)}">', result.stdout)


class Areas(unittest.TestCase):
    """Excess over full attention is a straight line of sparsity here, so areas are known."""

    def study(self, curves, full=(3.0, 3.1)):
        def run(method, seed, sparsity, loss):
            return Run(f"{method}{sparsity}{seed}", method, "compared", seed, {"s": sparsity}, "", "",
                       {"sparsity": sparsity, "loss": loss}, {})
        runs = [run("full", seed, 0.0, loss) for seed, loss in enumerate(full)]
        runs += [run(method, seed, sparsity, base + excess)
                 for seed, base in enumerate(full or [3.0])
                 for method, points in curves.items() for sparsity, excess in points]
        return Study("made up", "scratch", "", runs)

    def test_areas_over_the_common_range(self):
        study = self.study({"dash": [(0.9, 0.3), (0.5, 0.1)], "nsa": [(0.6, 0.1), (0.8, 0.1)]})
        (low, high), found = areas(study, "sparsity")
        self.assertEqual((low, high), (0.6, 0.8))
        numpy.testing.assert_allclose(found["dash"], [0.04, 0.04])  # 0.15 at 0.6 to 0.25 at 0.8
        numpy.testing.assert_allclose(found["nsa"], [0.02, 0.02])

    def test_a_bend_inside_the_range_counts(self):
        study = self.study({"dash": [(0.5, 0.0), (0.7, 0.2), (0.9, 0.0)]})
        numpy.testing.assert_allclose(areas(study, "sparsity")[1]["dash"], [0.04, 0.04])

    def test_what_has_no_area_is_said(self):
        lines = functools.partial(describe_areas, figure="sparsity")
        apart = self.study({"dash": [(0.5, 0.1), (0.6, 0.1)], "nsa": [(0.7, 0.1), (0.8, 0.1)]})
        self.assertEqual(lines(apart),
                         ["No area: the curves of DashAttention, NSA share no range of sparsity."])
        single = self.study({"dash": [(0.5, 0.1), (0.6, 0.1)], "nsa": [(0.7, 0.1)]})
        self.assertIn("No area, since no seed has two settings: NSA.", lines(single))
        self.assertIn("no full attention", lines(self.study({"dash": [(0.5, 0.1)]}, ()))[0])


if __name__ == "__main__":
    unittest.main()
