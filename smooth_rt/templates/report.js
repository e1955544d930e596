"use strict";
(() => {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");

  document.querySelectorAll("[data-morph]").forEach((morph) => {
    const slider = morph.querySelector("input[type=range]");
    const button = morph.querySelector("button");
    const shown = morph.querySelector("output");
    const screens = [...morph.querySelectorAll("[data-screen]")];
    const rows = [...morph.querySelectorAll(".row")].map((row) => [...row.querySelectorAll("img")]);
    const last = Number(slider.max);
    let timer = 0;
    let step = 1;

    const show = (i) => {
      slider.value = String(i);
      shown.textContent = (i + 1) + " of " + (last + 1);
      slider.setAttribute("aria-valuetext", "frame " + shown.textContent);
      screens.forEach((screen, s) => { screen.src = rows[s][i].src; });
      rows.forEach((row) => row.forEach((img, j) => img.classList.toggle("now", j === i)));
    };
    const stop = () => {
      window.clearInterval(timer);
      timer = 0;
      button.textContent = "Play";
    };
    const play = () => {
      if (timer || last < 1) return;
      button.textContent = "Pause";
      timer = window.setInterval(() => {
        const now = Number(slider.value);
        if (now + step > last || now + step < 0) step = -step;
        show(now + step);
      }, 110);
    };
    button.addEventListener("click", () => { if (timer) stop(); else play(); });
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    rows.forEach((row) => row.forEach((img, j) => img.addEventListener("click", () => { stop(); show(j); })));
    show(0);

    // A morph plays by itself only while it is on the screen, until it is stopped by hand, and never for those
    // who asked for less motion.
    let mine = true;
    button.addEventListener("click", () => { mine = false; });
    slider.addEventListener("input", () => { mine = false; });
    if ("IntersectionObserver" in window) {
      new IntersectionObserver((seen) => {
        if (!mine || still.matches) return;
        if (seen[0].isIntersecting) play(); else stop();
      }, { threshold: 0.4 }).observe(morph);
    }
    still.addEventListener("change", () => { if (still.matches) stop(); });
  });

  document.querySelectorAll("[data-before-after]").forEach((card) => {
    const slider = card.querySelector("input[type=range]");
    const stage = card.querySelector(".before-after");
    const cut = () => { stage.style.setProperty("--cut", slider.value + "%"); };
    slider.addEventListener("input", cut);
    cut();
  });
})();
