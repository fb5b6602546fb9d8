/* The search button is called what is written on it, and what is wider than its place can be moved
   with the keyboard: it becomes a stop of the Tab key. */

addEventListener("load", async () => {
  for (const button of document.querySelectorAll(".search-button-field"))
    button.removeAttribute("aria-label");
  await window.MathJax?.startup?.promise;
  for (const box of document.querySelectorAll("article pre, article mjx-container[display]")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
