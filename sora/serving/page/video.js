// The video: chosen, dropped, or recorded with the camera.

import { $, bytes, make, say } from "./dom.js";

const RECORD_MS = 3000;
// What this browser can record and the server can read: the first that both support.
const RECORDINGS = ["video/webm;codecs=vp8", "video/webm", "video/mp4"];
export const video = { file: null };
let preview = null;
let stream = null;

export function choose(file) {
  if (preview) URL.revokeObjectURL(preview);
  preview = null;
  video.file = file || null;
  $("preview").hidden = true;
  $("preview").removeAttribute("src");
  $("prompt").replaceChildren(make("strong", "", "Choose a video"), " or drop it here");
  if (file) {
    $("prompt").replaceChildren(make("strong", "", file.name), ` (${bytes(file.size)})`);
    preview = URL.createObjectURL(file);
    $("preview").src = preview;
  }
  document.dispatchEvent(new CustomEvent("video-chosen"));
}

$("preview").addEventListener("loadeddata", () => {
  $("preview").hidden = false;
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) $("preview").play().catch(() => {});
});
$("file").addEventListener("change", () => choose($("file").files[0]));
$("file").addEventListener("focus", () => $("drop").classList.add("focus"));
$("file").addEventListener("blur", () => $("drop").classList.remove("focus"));
for (const name of ["dragenter", "dragover"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) $("drop").addEventListener(name, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});

// The camera. Browsers offer it only to pages of this machine and over https; without it there is no button.

const kind = globalThis.MediaRecorder && RECORDINGS.find((name) => MediaRecorder.isTypeSupported(name));
$("camera").hidden = !(kind && navigator.mediaDevices && navigator.mediaDevices.getUserMedia);

$("camera").addEventListener("click", async () => {
  if (stream) return cameraOff();
  say($("camera-problem"), "");
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 640 } }, audio: false });
  } catch (error) {
    return say($("camera-problem"), `The camera can't be used: ${error.message || error.name}.`);
  }
  $("live").srcObject = stream;
  $("live").play().catch(() => {});
  showCamera(true);
});

$("record").addEventListener("click", () => {
  const parts = [];
  const recorder = new MediaRecorder(stream, { mimeType: kind });
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  recorder.addEventListener("stop", () => {
    $("record").disabled = false;
    $("record").textContent = "Record 3 seconds";
    cameraOff();
    const suffix = kind.startsWith("video/mp4") ? "mp4" : "webm";
    const name = `camera ${new Date().toTimeString().slice(0, 8).replaceAll(":", ".")}.${suffix}`;
    choose(new File(parts, name, { type: kind.split(";")[0] }));
    $("send").focus();
  });
  $("record").disabled = true;
  $("record").textContent = "Recording…";
  recorder.start();
  setTimeout(() => { if (recorder.state !== "inactive") recorder.stop(); }, RECORD_MS);
});

function cameraOff() {
  if (stream) stream.getTracks().forEach((track) => track.stop());
  stream = null;
  $("live").srcObject = null;
  showCamera(false);
}

function showCamera(on) {
  $("live").hidden = !on;
  $("record").hidden = !on;
  $("drop").hidden = on;
  $("file").hidden = on;
  $("send").hidden = on;
  $("camera").textContent = on ? "Camera off" : "Use the camera";
}
