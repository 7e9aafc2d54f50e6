// What both pages share.

/** A class name as the field takes it: those with commas in double quotes. */
export const quoted = (name) => (/[",]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name);

export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export async function errorOf(response) {
  try {
    return (await response.json()).error;
  } catch {
    return { message: `The server responded with ${response.status}.`, hint: "Try again in a moment." };
  }
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Shows in the elements of a page what went wrong. */
export function showProblem(at, error) {
  const unreachable = error instanceof TypeError;
  at["problem-message"].textContent = unreachable ? "The server does not respond." : error.message;
  at["problem-hint"].textContent = unreachable ? "Is proxydet serve still running?" : error.hint ?? "";
  at.problem.hidden = false;
}
