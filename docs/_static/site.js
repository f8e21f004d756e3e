// What the theme leaves out for those who come with a keyboard or a screen reader.
document.querySelectorAll("[role=heading]").forEach(caption => caption.setAttribute("aria-level", "2"));
document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "All pages");
document.querySelector(".toc-drawer")?.setAttribute("aria-label", "This page");

function reachWhatScrolls() {
  document.querySelectorAll("pre, .table-wrapper, mjx-container, div.math").forEach(box => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
}
addEventListener("load", reachWhatScrolls);
addEventListener("resize", reachWhatScrolls);
