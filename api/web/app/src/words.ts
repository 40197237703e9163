// How numbers and times are written.

export function latency(seconds: number | undefined): string {
  if (!seconds) return "–";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 0.1) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (seconds < 10) return `${Math.round(seconds * 1e3)} ms`;
  return `${Math.round(seconds)} s`;
}

export function rate(n: number): string {
  if (n === 0) return "0";
  if (n < 10) return n.toFixed(1);
  return Math.round(n).toLocaleString("en");
}

export function count(n: number, noun: string): string {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

export function bytes(n: number | undefined): string {
  if (n === undefined) return "–";
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]] as const) {
    if (n >= size) return `${(n / size).toFixed(1)} ${unit}`;
  }
  return `${n} B`;
}

export function ago(time: string, now: number): string {
  const s = Math.max(0, (now - Date.parse(time)) / 1000);
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

export function clock(time: string): string {
  const d = new Date(time);
  return d.toLocaleTimeString("en-GB") + "." + String(d.getMilliseconds()).padStart(3, "0");
}

/** How bad it is: 0 well, 1 something is out, 2 nothing serves. */
export function severity(row: { verdict: string; out: number }): 0 | 1 | 2 {
  if (row.verdict === "refused") return 2;
  return row.verdict === "panic" || row.out > 0 ? 1 : 0;
}
