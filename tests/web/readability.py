"""Readability of a page in the browser: contrast of its text, and overflow to the right."""

from __future__ import annotations

from playwright.sync_api import Page

# The WCAG 2 contrast of each text with its background; a canvas converts every colour format to RGBA.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    if (!element) return rgba(getComputedStyle(document.body).backgroundColor);
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour : over(colour, behind(element.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((c) => {
      c /= 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const words = texts.currentNode.textContent.trim();
    if (!words || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (element.closest("script, style, datalist, option, :disabled")) continue;
    const style = getComputedStyle(element);
    const paint = element instanceof SVGElement ? style.fill : style.color;
    const ground = behind(element);
    const [a, b] = [light(over(rgba(paint), ground)), light(ground)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)} ${element.tagName} ${words.slice(0, 40)}`);
  }
  return found;
}"""
# A table that scrolls inside its own box does not count.
OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"


def low_contrast_texts(tab: Page) -> list[str]:
    """The texts whose contrast is less than 4.5."""
    texts: list[str] = tab.evaluate(CONTRAST)
    return texts


def overflow_pixels(tab: Page) -> int:
    """By how many pixels the page is wider than the window."""
    pixels: int = tab.evaluate(OVERFLOW)
    return max(0, pixels)
