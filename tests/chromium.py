"""A real browser for the tests of pages: the fixture `browser`, and how a report is opened in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

needs_chromium = pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Debian's chromium-driver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path) -> Any:
    browser.get_log("browser")
    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(
        lambda b: b.find_element(By.TAG_NAME, "body").get_attribute("data-ready") == "true"
    )
    return browser


def unfold(browser: Any) -> None:
    """Open every group of charts, and wait until its charts are drawn."""
    browser.execute_script("for (const group of document.querySelectorAll('details.group')) group.open = true")
    is_drawn = "return [...document.querySelectorAll('.chart > svg')].every((svg) => svg.children.length)"
    WebDriverWait(browser, 5).until(lambda b: b.execute_script(is_drawn))


def shown(browser: Any, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)
