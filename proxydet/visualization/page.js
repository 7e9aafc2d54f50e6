(() => {
  const large = document.getElementById("large");
  const inLarge = large.querySelector("img");
  for (const button of document.querySelectorAll(".zoom")) {
    button.addEventListener("click", () => {
      const small = button.querySelector("img");
      inLarge.src = small.src;
      inLarge.alt = small.alt;
      large.showModal();
    });
  }
  large.addEventListener("click", () => large.close());
  for (const code of document.querySelectorAll("pre code")) {
    const words = code.textContent.split(" ").map((word) => Object.assign(document.createElement("span"), { textContent: word }));
    code.replaceChildren(...words.flatMap((word) => [" ", word]).slice(1));
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        const range = document.createRange();
        range.selectNodeContents(button.parentElement.querySelector("code"));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
})();
