// What is wider than the page scrolls within itself, by the keyboard too; figures keep a readable width on a phone.
addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll("article img.only-light, article img.only-dark")) {
    const box = document.createElement("div");
    box.className = "wide-figure";
    image.replaceWith(box);
    box.append(image);
  }
  const mark = () => {
    for (const part of document.querySelectorAll("article pre, article table, article .wide-figure")) {
      if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
      else part.removeAttribute("tabindex");
    }
  };
  mark();
  addEventListener("resize", mark);
  addEventListener("load", mark);
});
