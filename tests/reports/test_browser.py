"""Reports as readers open them: pages and the MLflow UI in a browser, and LaTeX compiled by pdflatex."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from linflab.reports.comparison import MeasuredRows, comparison_table, load_definition
from linflab.reports.papers import list_tables
from linflab.reports.rendering import write_table
from linflab.search_spaces.strict_yaml import read_mapping
from tests.conftest import FinishedSweep, RunCli
from tests.reports.runs import TABLE, make_run

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="requires chromium and chromedriver (Debian: chromium, chromium-driver)",
)
needs_latex = pytest.mark.skipif(
    not shutil.which("pdflatex"), reason="requires pdflatex with booktabs (Debian: texlive-latex-recommended)"
)
pytestmark = pytest.mark.browser
SCREENSHOTS = Path("build/screenshots")  # for inspection by eye


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100"):
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield driver
    driver.quit()


def wait_for_words(browser: WebDriver, *words: str, seconds: float = 60) -> str:
    """Wait until the page shows all words; return its text."""

    def read_text(driver: WebDriver) -> str:
        text = driver.find_element(By.TAG_NAME, "body").text
        return text if all(word in text for word in words) else ""

    waiting = WebDriverWait(browser, seconds, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(read_text, f"the page does not show {words}")


@needs_browser
def test_pages_show_all_cells_and_figures(
    browser: WebDriver, run_cli: RunCli, finished_sweep: FinishedSweep, tmp_path: Path
) -> None:
    """Visit the index, a table and a sweep; pages load nothing from other addresses."""
    assert (
        run_cli("report", "--all", "--storage", str(finished_sweep.storage), "--output-dir", str(tmp_path)).returncode
        == 0
    )
    browser.get(f"file://{tmp_path}/index.html")
    browser.find_element(By.LINK_TEXT, "Comparison of l_inf-dist nets with existing methods").click()
    cells = [cell.text for cell in browser.find_elements(By.TAG_NAME, "td")]
    table = comparison_table(load_definition("table1", read_mapping), pd.DataFrame())
    expected = [row.cell(column).text for row in table.rows for column in table.columns]
    assert [cell.replace("\N{SCRIPT SMALL L}\N{INFINITY}", "l_inf") for cell in cells] == expected
    browser.save_screenshot(str(SCREENSHOTS / "table1.png"))
    browser.back()
    browser.find_element(By.PARTIAL_LINK_TEXT, "Sweep three").click()
    wait_for_words(browser, "reproduce", "linflab train digits_eps0.1_linf_dist_net")
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) == 2 and all(image.get_property("naturalWidth") for image in images)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(address.startswith("data:") for address in loaded)
    browser.save_screenshot(str(SCREENSHOTS / "sweep.png"))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@needs_browser
def test_mlflow_ui_shows_a_sweep_and_its_trials(browser: WebDriver, finished_sweep: FinishedSweep) -> None:
    """Click through `linflab ui`: a sweep with its table as description, and a trial with metrics and figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("linflab")), "ui", "--port", str(port)]
    command += ["--storage", str(finished_sweep.storage)]
    ui = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert ui.stdout is not None
        address = next(line for line in ui.stdout if "digits eps 0.1: http" in line).split(": ")[1].strip()
        WebDriverWait(browser, 120, ignored_exceptions=[Exception]).until(lambda driver: _open_page(driver, address))
        wait_for_words(browser, "three", "matching runs")
        browser.find_element(By.LINK_TEXT, "three").click()
        text = wait_for_words(browser, "Sweep three: digits, eps = 0.1", "Child runs", "three-1", "three-2", "three-3")
        assert re.search(r"Val\.\s+certified", text)
        browser.save_screenshot(str(SCREENSHOTS / "mlflow_sweep.png"))
        browser.find_element(By.PARTIAL_LINK_TEXT, "three-2").click()
        wait_for_words(browser, "Parent run", "test/certified_accuracy", "p_schedule.start")
        browser.save_screenshot(str(SCREENSHOTS / "mlflow_trial.png"))
        browser.find_element(By.LINK_TEXT, "three").click()  # the parent run
        wait_for_words(browser, "Child runs")
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait(30)


def _open_page(driver: WebDriver, address: str) -> bool:
    driver.get(address)
    return "MLflow" in driver.title


def compile_latex(folder: Path, name: str) -> str:
    """Run pdflatex, check that it reports no problem, and return its output."""
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    for words in ("Float too large", "Overfull"):  # content beyond the page is lost
        assert words not in done.stdout
    assert (folder / f"{name}.pdf").stat().st_size > 10_000
    return done.stdout


@needs_latex
def test_latex_compiles_standalone_and_in_a_paper(
    tmp_path: Path, run_cli: RunCli, finished_sweep: FinishedSweep
) -> None:
    strange = "\\[a_b] 100% & ~$x^2$ #{} <é> ± |* \N{SCRIPT SMALL L}∞ → β 是\n\n"
    odd = [make_run(1, 0.78, 0.77), make_run(2, 0.7, 0.75, method=strange)]
    write_table(comparison_table(TABLE, pd.DataFrame(odd)), tmp_path, "odd")
    by_width = TABLE.model_copy(update={"measured": MeasuredRows(group_by=("model.width",))})
    many = pd.DataFrame([make_run(k, 0.7, 0.7, **{"model.width": str(k)}) for k in range(200)])
    write_table(comparison_table(by_width, many), tmp_path, "many")
    assert (
        run_cli("report", "--all", "--storage", str(finished_sweep.storage), "--output-dir", str(tmp_path)).returncode
        == 0
    )
    names = [*list_tables(), "odd", "many", "sweep-three"]
    for name in names:
        compile_latex(tmp_path, name)
    inputs = "\n".join(rf"\input{{{name}}}" for name in names)
    head = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\nText.\n"
    (tmp_path / "paper.tex").write_text(f"{head}{inputs}\nMore.\n\\end{{document}}\n")
    compile_latex(tmp_path, "paper")
