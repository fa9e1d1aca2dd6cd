// Visible texts with less contrast than WCAG 2.2 AA asks for (1.4.3): [text, ratio]. Opacity counts.
() => {
  const channels = (color) => color.match(/[\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const groundOf = (node) => {
    if (!node) return [255, 255, 255];
    const color = channels(getComputedStyle(node).backgroundColor);
    return (color[3] ?? 1) === 1 ? color.slice(0, 3) : over(color, groundOf(node.parentElement));
  };
  const opacityOf = (node) => (node ? Number(getComputedStyle(node).opacity) * opacityOf(node.parentElement) : 1);
  const poor = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const node = texts.currentNode.parentElement;
    if (!text || !node.checkVisibility() || node.closest(".unseen, script, noscript, :disabled")) continue;
    const ground = groundOf(node);
    const [r, g, b] = channels(getComputedStyle(node).color);
    const ink = over([r, g, b, opacityOf(node)], ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < 4.5) poor.push([text.slice(0, 40), Math.round(ratio * 100) / 100]);
  }
  return poor;
}
